"""What `training.export.export_model` is made of: stages, the step's graph, the description and the publication."""
