"""Building a bundle: exporting, checking, reducing precision, compiling plans."""
