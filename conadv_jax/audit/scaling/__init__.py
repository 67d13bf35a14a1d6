"""Step times of other slices, predicted from one compiled program."""
