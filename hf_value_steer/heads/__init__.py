"""What is trained to value hidden states, and how it is saved and loaded."""
