"""What decides the mixture of experts: gate networks, pooling, statistics, collating."""
