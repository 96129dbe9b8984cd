"""Teacher and student as transformers loads them."""
