"""Config files: each has get_config(arg); they import ml_collections and each other only."""
