"""Cloud-to-edge streams: many of them, each with its own credit, over one link that the node dials out."""
