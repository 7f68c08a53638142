"""A sequential recommender with instance-wise LoRA: data, sequence models, the recommender, training and metrics."""
