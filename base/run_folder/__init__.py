"""The run folder: creating and locking it, reading its files, logs, and its place in a study.

`base.run_folder.folder` creates and opens run folders; it is not imported here because it needs
`base.checkpoint`, which needs the file names in `base.run_folder.names`.
"""
