"""The scripts behind results, each run as `PYTHONPATH=kernels python -m bench.FOLDER.SCRIPT`."""
