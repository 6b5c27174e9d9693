"""What travels on the bulk face: pieces of a transfer, their header and their ids."""

import enum
import secrets
import struct
import zlib
