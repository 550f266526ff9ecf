"""The command line. `robustkern.cli.info` needs PyTorch alone; everything else here needs the extra `train`."""
