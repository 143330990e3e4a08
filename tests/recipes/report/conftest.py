import pytest

from tests.recipes.report.folder import write_run
from tests.support import write_images


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """An ImageFolder whose evaluation set has 9 images in 3 classes, the first with a hostile name."""
    folder = write_images(tmp_path_factory.mktemp("photos") / "dataset")
    for split in ("train", "val"):
        (folder / split / "class0").rename(folder / split / "<script>alert(1)<&$x$")
    return folder


@pytest.fixture
def run_folder(tmp_path, photos):
    """A finished run's folder, with everything that a report shows."""
    return write_run(tmp_path / "runs" / "one", photos)
