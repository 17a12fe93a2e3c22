"""Sample text: one prompt or many, with given random numbers."""
