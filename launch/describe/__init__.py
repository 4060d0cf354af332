"""What a layout is, holds and sends, as text."""
