"""An adapter in somebody's model: the class whose call takes a gate, inject, loading, PEFT."""
