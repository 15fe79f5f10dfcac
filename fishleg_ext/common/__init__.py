"""Every other part of the library stands on these: block layouts, dtypes, checks of arguments, progress bars."""
