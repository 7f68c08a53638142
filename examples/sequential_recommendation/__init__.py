"""A sequential recommender with instance-wise LoRA: data, sequence models, metrics."""
