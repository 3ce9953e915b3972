"""Commands that look at what training has made: scores, pictures, comparisons."""
