/// Errors thrown by the core. The bindings turn InvalidArgument into ValueError; std::bad_alloc becomes
/// MemoryError.
///
/// A message names the function, the argument and the place, says what was found and what was expected, e.g.
/// "rank_value: row 3: indices[17] = 70000 is out of range for 20000 genes". The core never prints or exits.
#pragma once

#include <stdexcept>
#include <string>

namespace scfm {

/// An argument that cannot be worked with: wrong length, out of range, broken structure.
class InvalidArgument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

}  // namespace scfm
