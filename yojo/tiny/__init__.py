"""The toy world: what it is (`world.py`), conversations about it (`talks.py`), reward models trained and tested in it
(`experiment.py`), one model under every mask (`comparison.py`), a policy (`captions.py`), and studies of all kinds of
reward models over several seeds (`studies.py`)."""
