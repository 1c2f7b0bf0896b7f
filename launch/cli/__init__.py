"""The command line. Its own imports are compiled once, too, where an image keeps no compiled modules."""

from launch.local.bytecode import keep_own_bytecode

keep_own_bytecode()
