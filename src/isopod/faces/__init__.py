"""faces: what isopod is to programs that speak another protocol than its own. A face is a client of `isopod.api`, no more."""
