"""One module for each kind of chart, drawn on given axes from plain arrays in the theme of a file or of the page."""
