"""A name or a folder -> a model and a tokenizer: published names, layouts, devices, loading."""
