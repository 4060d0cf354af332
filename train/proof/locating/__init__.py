"""Where a strategy goes wrong: the first wrong activation, the first wrong gradient, or the first wrong part of the
update, with the likely kind of mistake."""
