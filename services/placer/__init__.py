"""The placer: which layers of a model run on which instance."""
