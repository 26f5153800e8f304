"""Training at the top and cutting inside the training, against training at the lower rank."""
