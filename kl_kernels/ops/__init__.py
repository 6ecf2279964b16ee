"""The operators as torch knows them: registration, gradients, transforms."""
