"""Making a trained model smaller: methods, their files, and the table that compares them."""
