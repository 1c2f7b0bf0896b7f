"""The command line. Its own imports are compiled once, too, where an image keeps no compiled modules."""

from launch.interrupts import hide_interrupts

hide_interrupts()  # the imports take half a second, in which somebody may press Ctrl-C

from launch.local.bytecode import keep_own_bytecode  # noqa: E402

keep_own_bytecode()
