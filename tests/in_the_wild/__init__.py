"""Files that people have, rebuilt small: each made by the library that writes it, with the answers of its own unfused forward in float64.

Public reports on other projects' trackers are their pattern. ``tests/checkpoints/test_in_the_wild.py`` folds each, and
``python -m benchmarks.in_the_wild`` makes a table of them.
"""

from .algorithms import ALGORITHMS
from .diffusion import DIFFUSION
from .elsewhere import ELSEWHERE
from .experts import EXPERTS
from .folders import FOLDERS
from .models import MODELS
from .names import NAMES
from .states import STATES
from .whole import WHOLE

WILD = [*NAMES, *EXPERTS, *FOLDERS, *MODELS, *STATES, *WHOLE, *ALGORITHMS, *DIFFUSION, *ELSEWHERE]
