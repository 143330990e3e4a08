import shutil

import pytest
from conftest_checkpoints import damage, identity
