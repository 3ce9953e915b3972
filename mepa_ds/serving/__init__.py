"""A local web page that draws images of a model."""
