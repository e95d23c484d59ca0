"""How clients speak to us: wire format <-> core, one file a dialect."""
