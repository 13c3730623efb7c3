"""Arguments of the public functions, checked and brought into one form."""
