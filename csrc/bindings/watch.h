// Whether anything that a bound call of a model hangs on has changed since it was bound.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace lamina {

// dicts: those that say what modules and objects are; Python counts the changes of each (PEP 509), so that one number
// tells whether anything in it was ever set again. tensors: whose memory and version must be the ones they were.
class Watch {
 public:
  Watch(pybind11::list dicts, pybind11::list tensors);
  bool changed() const;

 private:
  uint64_t version_of_dict(pybind11::handle dict) const;

  pybind11::list dicts_, tensors_;
  pybind11::object dict_version_, version_name_;
  std::vector<uint64_t> dict_versions_;
  std::vector<const void*> places_;
  std::vector<int64_t> versions_;
};

void define_watch(pybind11::module_& m);

}  // namespace lamina
