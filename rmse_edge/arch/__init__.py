"""One folder or file per architecture, named after its `model_type`."""
