"""The measures of `turnout bench`."""
