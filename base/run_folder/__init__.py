"""The run folder: who may write into it, what the run says about itself, its logs, its place in a
study."""
