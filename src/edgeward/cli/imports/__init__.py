"""Files of other systems that `apply` takes: Compose files and Kubernetes manifests become resources.

``taking.py`` reads fields and remembers which were not read; ``compose.py`` and ``kube.py`` translate. All of it is
pure but for the files that a Compose file names, which come through a function that is given.
"""
