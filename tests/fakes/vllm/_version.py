__version__ = version = "7.5.1"
