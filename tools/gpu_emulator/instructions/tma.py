from ..errors import Unsupported


def decode_bulk(d):
    raise Unsupported("cp.async.bulk")
