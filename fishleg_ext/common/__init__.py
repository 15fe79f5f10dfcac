"""What every other part of the library stands on: block layouts, dtypes, checks of arguments, progress bars."""
