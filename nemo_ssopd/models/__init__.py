"""What a model family is: one record each."""
