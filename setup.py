"""Name the packages, which pyproject.toml cannot: files of dashboards/ install as the data of enginefsm.dashboards."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["enginefsm", "enginefsm.*"]), "enginefsm.dashboards"],
    package_dir={"enginefsm.dashboards": "dashboards"},
)
