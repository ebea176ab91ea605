"""The data sets of kdzoo: every module of this folder holds one, named after its file."""
