"""How good the images are: drawn scenes and their judge, feature statistics, scaling laws, reports."""
