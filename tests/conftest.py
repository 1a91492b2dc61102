"""How hypothesis runs here: the same examples every time, and no deadline, so that a slow machine is no failure.

``HYPOTHESIS_PROFILE=explore`` looks further: new examples each time.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("edgeward", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "edgeward"))
