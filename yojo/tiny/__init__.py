"""The toy world: what it is (`world.py`), reward models trained and tested in it (`experiment.py`), one model under
every mask (`comparison.py`), and a policy (`captions.py`)."""
