"""What a model attends to while it answers: the two observations behind A-VL, measured on any checkpoint."""
