from kvds.config.settings import AlignmentSettings as AlignmentSettings
from kvds.distiller import KVDistiller as KVDistiller

__version__: str
