"""Build step: recipes, DeepSpeed configurations and the quickstart's teacher go into the wheel from where they lie."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("ds_configs", "launch/recipes", "launch/quickstart_teacher")


class BuildWithShippedFiles(build_py):
    """Copies the folders below ``kvds/shipped``; an editable installation finds them in the checkout."""

    def run(self) -> None:
        """Build as always, then copy."""
        super().run()
        if self.editable_mode:
            return
        for folder in SHIPPED:
            if not Path(folder).is_dir():
                raise SystemExit(f"{folder}: no such folder; expected a whole checkout or source archive")
            self.copy_tree(folder, str(Path(self.build_lib, "kvds/shipped", folder)))


setup(cmdclass={"build_py": BuildWithShippedFiles})
