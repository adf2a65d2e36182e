"""Everything that touches Ray's private surface, or that differs between Ray's versions.

An import of any of its modules checks first that this Ray has what enginefsm reads.
"""

from enginefsm._ray.surface import check_modules

check_modules()
