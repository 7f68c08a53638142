"""What decides the mixture of experts: gate networks, pooling, statistics, and a collator for their inputs."""
